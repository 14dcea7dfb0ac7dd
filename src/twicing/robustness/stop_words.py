"""English words that carry grammar rather than content, which `paper_compat` of word_swap.py never swaps.

Written for this library: which list the related code used is not known.
"""

_WORDS = """
    a an the this that these those
    i me my mine myself we us our ours ourselves you your yours yourself yourselves
    he him his himself she her hers herself it its itself they them their theirs themselves
    who whom whose which what where when why how
    am is are was were be been being do does did doing done have has had having
    can could may might must shall should will would ought
    and or but nor so yet if then else than because since while although though unless until whether as
    about above across after against along among around at before behind below beneath beside besides between beyond
    by down during except for from in inside into like near of off on onto out outside over past per through
    throughout to toward towards under up upon via with within without
    no not any some all both each either neither every few many more most much less least other others another such
    only own same too very just also there here now again once ever never
    's 't n't 'm 're 've 'd 'll s t
"""

STOP_WORDS = frozenset(_WORDS.split())
