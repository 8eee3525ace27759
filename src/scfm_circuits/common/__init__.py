"""What every room uses.

Reading order: `profile_files` and `profile` (one typed, validated profile), `files` (safe writing,
digests), `kept` (what is kept, and while it is current), `manifest` and `fetch` (data sets and
models from elsewhere), `compiled` (numba loops, threads), `randomness` (streams by name).
"""
