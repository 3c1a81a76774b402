"""placeholder"""
import torch
from ..precision import Precision
from .reference import reference_attention
def attention(q,k,v,mask,*,table=None,order=None,text_tokens=0,valid_text=None,precision=None,softmax_scale=None,return_lse=False,impl="auto"):
    N=q.shape[1]
    if table is None: table=torch.arange(N,device=q.device)[None].int(); order=torch.zeros(q.shape[2],device=q.device).long()
    p=Precision.parse(precision or "fp32")
    o,l=reference_attention(q,k,v,table=table,order=order,mask=mask,precision=p,softmax_scale=softmax_scale or q.shape[-1]**-.5,valid_tokens=None if valid_text is None else N-text_tokens+valid_text)
    return (o,l) if return_lse else o
