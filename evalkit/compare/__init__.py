"""What two runs of one model differ by: metrics, layer streams, rungs, noise floors."""
