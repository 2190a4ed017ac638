from vllm.recorded import RECORDED

if RECORDED["dense_prefill"]:

    def _use_dense_mha_prefill(vllm_config, prefill_max_seq_len, topk_tokens):
        return prefill_max_seq_len <= topk_tokens
