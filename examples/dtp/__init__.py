"""DTP: restoration networks that learn to generate before they learn to restore, and do not forget it."""
