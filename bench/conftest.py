import os

os.environ["HF_HUB_OFFLINE"] = "1"

import transformers

transformers.utils.logging.disable_progress_bar()
