from vllm.recorded import AttentionConfig

__all__ = ["AttentionConfig"]
