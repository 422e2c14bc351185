"""Bags in and out, without DDS."""
