"""The shared kernel of the image-to-image job service: what gateway and worker have in common."""
