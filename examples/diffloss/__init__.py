"""DiffLoss: training the small prior that ships."""
