"""The gateway: REST and gRPC front ends over one job service."""
