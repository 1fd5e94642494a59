"""DiffLoss: restoration networks that train with a diffusion prior, and the training of the small one that ships."""
