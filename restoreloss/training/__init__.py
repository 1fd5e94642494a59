"""What happens around the objectives while a network trains."""
