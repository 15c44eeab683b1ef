"""The real programs that our files and numbers are held against."""
