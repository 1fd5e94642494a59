"""Tests of restoreloss."""
