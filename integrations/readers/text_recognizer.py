"""EasyOCR's english_g2 reads lines of text: gray, 64 pixels high, in [-1, 1]; convolutions and sequences are compared.

It needs `pip install -e ".[reading]"` in a clone (or your file english_g2.pth), and the clone for examples/reading.
"""

import torch

from examples.common.networks.text_readers import TDP_LAYERS, english_g2, to_english_g2
from restoreloss import TDPLoss

recognizer = english_g2()
loss = TDPLoss(recognizer, TDP_LAYERS, normalize=to_english_g2)
restored, clean = torch.rand(1, 3, 32, 64, requires_grad=True), torch.rand(1, 3, 32, 64)
loss(restored, clean).backward()


# A recognizer of two arguments, as EasyOCR's own class is: a tuple is the positional arguments.
class OfTwo(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.recognizer = recognizer

    def forward(self, images, text):
        return self.recognizer(images)


def with_text(images):
    return to_english_g2(images), torch.zeros(len(images), 1, dtype=torch.long)


two = TDPLoss(OfTwo(), [f"recognizer.{layer}" for layer in TDP_LAYERS], normalize=with_text)
torch.testing.assert_close(two(restored, clean), loss(restored, clean))
