"""What every stage stands on and nothing of diffusion: files, locks, processes, the terminal."""
