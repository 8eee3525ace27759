"""What every room uses.

Reading order: `profile_files` and `profile` (one typed, validated profile), `files` (safe writing,
digests), `manifest` (data sets and models), `compiled` (numba loops, threads).
"""
