"""Cases of which it is known that every grid and every device must give the same, and how that is found out."""
