"""What two or more operations use: dispatch, layouts, draws, kept launches."""
