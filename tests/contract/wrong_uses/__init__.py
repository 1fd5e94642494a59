"""Wrong uses of everything that is exported, a table for each area, and what each of them must be told.

To add one, add a line to the table of its area:

    wrong("DiffLoss", "a class for an instance", lambda: DiffLoss(UNet2DModel), "denoiser"),
"""
