"""Checkpoints in service: an engine that exists already, supervised, behind one small front.

    choice       which engine runs this checkpoint on this machine, and why
    engines      how each is started
    child        a process that is watched, and stopped with everything that it started
    front        the address that clients see: keys, errors in the API's form, metrics, the page
    service      all of it from start to stop
    client, chat, bench    the other side

halfbyte computes no token here; vLLM, llama.cpp and transformers do. Does not cover: several models behind one address,
and TLS (put a reverse proxy in front).
"""
