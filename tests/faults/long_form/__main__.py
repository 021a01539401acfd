"""`python -m tests.faults.long_form WORK`: processes that trials run in do not import this again."""

from tests.faults.long_form.run import main

main()
