"""The measurements themselves: that each still runs, and what the figures in between mean."""
