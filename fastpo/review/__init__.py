"""What a run found out about its labels: tables, a gallery to judge them by eye, cleaned data."""
