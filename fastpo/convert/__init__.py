"""Other trainers' launch commands and configurations as ours."""
