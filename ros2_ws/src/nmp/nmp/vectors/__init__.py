"""Map elements with an identity: those around the car, followed from frame to frame, and those of a city, in files."""
