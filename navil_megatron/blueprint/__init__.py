"""What follows from a config by arithmetic, without torch: parameters, FLOPs, and the plans of images and rows."""
