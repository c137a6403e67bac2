"""Where arithmetic runs: the Device seam and the devices behind it."""
