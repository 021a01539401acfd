"""`python -m tests.faults.long_form WORK`; the processes of trials do not import this again."""

from tests.faults.long_form.run import main

main()
