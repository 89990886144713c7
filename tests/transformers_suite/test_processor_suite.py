"""AKI's processor in transformers' suite for processors."""

import unittest

from shared import suite
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from aki import AkiProcessor
from aki.data.tokenizer import train_tokenizer
from aki.models.templates import AKI, END_TOKEN

common = suite("test_processing_common")

WORDS = "upper older longer string lower newer what is in the picture describe these videos audio tell me about it"


NO_NETWORK = "the test fetches a picture"
OTHER_MEDIA = "AKI refuses media that a processor does not take, where the test expects them to be passed over"
OWN_WORDS = "AKI says in a sentence of its own how many placeholders and pictures there are"
BLANK = "the small tokenizer decodes a blank before the first word, so that the text's places are off by one"
REFUSED = {
    "test_apply_chat_template_image": NO_NETWORK,
    "test_flat_kwarg_applied_when_modality_dict_lacks_it": OTHER_MEDIA,
    "test_model_input_names": OTHER_MEDIA,
    "test_processor_text_has_no_visual": OTHER_MEDIA,
    "test_if_input_has_mismatching_tokens_and_mm_data": OWN_WORDS,
    "test_replacement_offsets": BLANK,
}
"""Beginnings of tests' names -> why they are not run."""


class ProcessorTest(common.ProcessorTesterMixin, unittest.TestCase):
    processor_class = AkiProcessor

    @classmethod
    def _setup_image_processor(cls):
        return SiglipImageProcessorPil(size={"height": 16, "width": 16})

    @classmethod
    def _setup_tokenizer(cls):
        return train_tokenizer([WORDS], bos_token="<s>", more=(END_TOKEN,))

    @staticmethod
    def prepare_processor_dict():
        return {"image_seq_length": 4, "chat_template": AKI}

    def setUp(self):
        for name, reason in REFUSED.items():
            if self._testMethodName.startswith(name):
                self.skipTest(reason)
