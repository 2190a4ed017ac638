from typing import Literal

from vllm.recorded import RECORDED

CacheDType = Literal[tuple(RECORDED["CacheDType"])]
