"""Every arXiv number in a docstring is that of the paper it names: the papers are listed here, with their titles."""

import re
from pathlib import Path

from vision_attn import describe

ROOT = Path(__file__).parents[2]
NUMBER = re.compile(r"arxiv\.org/\w+/(\d{4}\.\d{5})")

# number: first author, the name of the paper here, its title
PAPERS = {
    "1512.03385": ("He", "ResNet", "Deep Residual Learning for Image Recognition"),
    "1706.03762": ("Vaswani", "Transformer", "Attention Is All You Need"),
    "1707.04585": ("Gomez", "RevNet", "The Reversible Residual Network: Backpropagation Without Storing Activations"),
    "1801.10198": ("Liu", "T-DMCA", "Generating Wikipedia by Summarizing Long Sequences"),
    "1805.00631": ("Zhang", "AAN", "Accelerating Neural Transformer via an Average Attention Network"),
    "1805.08315": (
        "Linsley",
        "Pathfinder",
        "Learning long-range spatial dependencies with horizontal gated-recurrent units",
    ),
    "1807.06521": ("Woo", "CBAM", "CBAM: Convolutional Block Attention Module"),
    "1810.00825": ("Lee", "Set Transformer", "Set Transformer: Attention-based Permutation-Invariant Neural Networks"),
    "1810.10182": ("Yang", "Localness", "Modeling Localness for Self-Attention Networks"),
    "1811.11721": ("Huang", "CCNet", "CCNet: Criss-Cross Attention for Semantic Segmentation"),
    "1812.01243": ("Shen", "Efficient Attention", "Efficient Attention: Attention with Linear Complexities"),
    "1901.02860": ("Dai", "Transformer-XL", "Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context"),
    "1902.09113": ("Guo", "Star-Transformer", "Star-Transformer"),
    "1904.10509": ("Child", "Sparse Transformer", "Generating Long Sequences with Sparse Transformers"),
    "1904.11492": ("Cao", "GCNet", "GCNet: Non-local Networks Meet Squeeze-Excitation Networks and Beyond"),
    "1905.07799": ("Sukhbaatar", "Adaptive Attention Span", "Adaptive Attention Span in Transformers"),
    "1905.10308": ("Calian", "SCRAM", "SCRAM: Spatially Coherent Randomized Attention Maps"),
    "1906.05909": ("Ramachandran", "SASA", "Stand-Alone Self-Attention in Vision Models"),
    "1907.00641": ("Joutard", "PAM", "Permutohedral Attention Module for Efficient Non-Local Neural Networks"),
    "1907.05242": ("Lample", "Large Memory Layers", "Large Memory Layers with Product Keys"),
    "1907.12273": ("Huang", "ISA", "Interlaced Sparse Self-Attention for Semantic Segmentation"),
    "1907.13426": ("Li", "EMANet", "Expectation-Maximization Attention Networks for Semantic Segmentation"),
    "1911.04070": ("Ye", "BP-Transformer", "BP-Transformer: Modelling Long-Range Context via Binary Partitioning"),
    "1911.05507": ("Rae", "Compressive Transformer", "Compressive Transformers for Long-Range Sequence Modelling"),
    "1911.11423": ("Merity", "SHA-RNN", "Single Headed Attention RNN: Stop Thinking With Your Head"),
    "1912.00835": ("Mehta", "LAMA", "Low Rank Factorization for Compact Multi-Head Self-Attention"),
    "1912.12180": ("Ho", "Axial Transformer", "Axial Attention in Multidimensional Transformers"),
    "2001.04451": ("Kitaev", "Reformer", "Reformer: The Efficient Transformer"),
    "2002.11296": ("Tay", "Sparse Sinkhorn Attention", "Sparse Sinkhorn Attention"),
    "2003.02436": ("Shazeer", "Talking-Heads Attention", "Talking-Heads Attention"),
    "2003.05997": ("Roy", "Routing Transformer", "Efficient Content-Based Sparse Attention with Routing Transformers"),
    "2003.09833": ("Li", "SAC", "SAC: Accelerating and Structuring Self-Attention via Sparse Adaptive Connection"),
    "2004.01961": ("Li", "AutoNL", "Neural Architecture Search for Lightweight Non-Local Networks"),
    "2004.05150": ("Beltagy", "Longformer", "Longformer: The Long-Document Transformer"),
    "2004.08483": ("Ainslie", "ETC", "ETC: Encoding Long and Structured Inputs in Transformers"),
    "2005.00341": ("Dhariwal", "Jukebox", "Jukebox: A Generative Model for Music"),
    "2005.00581": ("Subramanian", "Multi-scale Transformer", "Multi-scale Transformer Language Models"),
    "2005.00742": ("You", "Hard-coded Gaussian", "Hard-Coded Gaussian Attention for Neural Machine Translation"),
    "2005.00743": ("Tay", "Synthesizer", "Synthesizer: Rethinking Self-Attention in Transformer Models"),
    "2006.03274": ("Gupta", "GMAT", "GMAT: Global Memory Augmentation for Transformers"),
    "2006.04768": ("Wang", "Linformer", "Linformer: Self-Attention with Linear Complexity"),
    "2006.05174": ("Wu", "Hand-crafted Attention", "Input-independent Attention Weights Are Expressive Enough"),
    "2006.16362": ("Cordonnier", "Collaborate", "Multi-Head Attention: Collaborate Instead of Concatenate"),
    "2006.16236": ("Katharopoulos", "Transformers are RNNs", "Transformers are RNNs: Fast Autoregressive Transformers"),
    "2007.03815": ("Hu", "FANet", "Real-time Semantic Segmentation with Fast Attention"),
    "2007.04825": ("Vyas", "Clustered Attention", "Fast Transformers with Clustered Attention"),
    "2007.14062": ("Zaheer", "Big Bird", "Big Bird: Transformers for Longer Sequences"),
    "2009.14794": ("Choromanski", "Performer", "Rethinking Attention with Performers"),
    "2011.04006": ("Tay", "Long Range Arena", "Long Range Arena: A Benchmark for Efficient Transformers"),
    "2012.11747": ("He", "RealFormer", "RealFormer: Transformer Likes Residual Attention"),
    "2012.07436": (
        "Zhou",
        "Informer",
        "Informer: Beyond Efficient Transformer for Long Sequence Time-Series Forecasting",
    ),
    "2102.03902": (
        "Xiong",
        "Nyströmformer",
        "Nyströmformer: A Nyström-Based Algorithm for Approximating Self-Attention",
    ),
    "2103.02143": ("Peng", "RFA", "Random Feature Attention"),
    "2105.03824": ("Lee-Thorp", "FNet", "FNet: Mixing Tokens with Fourier Transforms"),
    "2105.08050": ("Liu", "gMLP", "Pay Attention to MLPs"),
    "2105.14103": ("Zhai", "AFT", "An Attention Free Transformer"),
    "2106.01540": ("Ma", "Luna", "Luna: Linear Unified Nested Attention"),
    "2106.14881": ("Xiao", "ViT-C", "Early Convolutions Help Transformers See Better"),
    "2107.00645": ("Rao", "GFNet", "Global Filter Networks for Image Classification"),
    "2209.15001": ("Hassani", "DiNAT", "Dilated Neighborhood Attention Transformer"),
    "2303.08810": ("Zhu", "BiFormer", "BiFormer: Vision Transformer with Bi-Level Routing Attention"),
    "2310.01889": ("Liu", "ring attention", "Ring Attention with Blockwise Transformers for Near-Infinite Context"),
    "2403.13298": ("Heo", "RoPE for vision transformers", "Rotary Position Embedding for Vision Transformer"),
    "2412.05496": (
        "Dong",
        "FlexAttention",
        "Flex Attention: A Programming Model for Generating Optimized Attention Kernels",
    ),
}


def numbers_given() -> dict[str, set[str]]:
    """The arXiv numbers in the code and documents of each room, with the files that give them."""
    rooms = (ROOT / room for room in ("vision_attn", "backbones", "training"))
    files = [*ROOT.glob("docs/*.md"), *(file for room in rooms for file in room.rglob("*.py"))]
    found = {}
    for file in files:
        for number in NUMBER.findall(file.read_text(encoding="utf-8")):
            found.setdefault(number, set()).add(file.name)
    return found


def test_every_number_is_that_of_a_listed_paper():
    given = numbers_given()
    assert len(given) > 30
    unknown = {number: files for number, files in given.items() if number not in PAPERS}
    assert not unknown, "not in the list of papers: look the number up, then add it with its title"
    assert PAPERS.keys() <= given.keys(), "listed, and given nowhere"


def test_a_block_names_the_paper_behind_its_address(block_name):
    entry = describe(block_name)
    number = NUMBER.search(entry.url).group(1)
    author, name, _ = PAPERS[number]
    named = [re.match(r"(\S+)\b.*? (\d{4}), (.+)", source).groups() for source in entry.source.split("; ")]
    years = [int(year) for first, year, called in named if first == author and called.split(",")[0] == name]
    assert len(years) == 1, f"{entry.source!r}: arXiv {number} is {author}'s {name}"
    assert 0 <= years[0] - (2000 + int(number[:2])) <= 3, "a paper comes out in the year of its number or soon after"
