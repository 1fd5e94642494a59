"""What keeps fine-tuning from undoing what pre-training taught: penalties on parameters and on gradients."""
