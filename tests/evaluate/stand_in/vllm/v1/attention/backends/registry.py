from enum import Enum

from vllm.recorded import RECORDED, SCRIPT


def backend(name):
    class Backend:
        supported_kv_cache_dtypes = RECORDED["cache_dtypes"].get(
            name, RECORDED["cache_dtypes"]["FLASHINFER_MLA_SPARSE"]
        )

        @staticmethod
        def get_name():
            return name

        @classmethod
        def supports_compute_capability(cls, capability):
            return capability.major == SCRIPT.get(name, 9)

        @classmethod
        def supports_kv_cache_dtype(cls, kv_cache_dtype):
            return kv_cache_dtype in cls.supported_kv_cache_dtypes

    return Backend


AttentionBackendEnum = Enum("AttentionBackendEnum", {name: name for name in RECORDED["backends"]})
AttentionBackendEnum.get_class = lambda self: backend(self.name)
