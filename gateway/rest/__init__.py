"""The REST front ends: the native jobs API and Cloudflare's dialect, over one service."""
