"""What a run does when a rank fails."""
