"""`dequantize_4bit`: the public function is in `api.py`, its plain meaning in `xla.py`."""
