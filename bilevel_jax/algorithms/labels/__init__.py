"""Rewards learned from labels on pairs of segments: where labels come from, and what is fitted to them."""
