"""What a run says beyond its data: noisy iterations with their bounds, and risks under attack."""
