"""The report of runs: one HTML file without references to other files."""
