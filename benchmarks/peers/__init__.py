"""Peers: other ways to compute the same step, for agreement in the tests and for comparison of speed."""
