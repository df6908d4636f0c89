"""A language model of words: recurrent (RNN, LSTM, GRU) or a Transformer.

    python examples/word_language_model.py --model LSTM --log runs/words

The text is Python's documentation, the topics of ``help()``: 80,000 words and signs for training
and 9,000 for validation, 3,272 different ones. Recurrent models are trained by truncated
backpropagation through time: the state passes from piece to piece, the gradient does not.

``--clip`` takes a number or one of the rules in rules.py. With torch 2.13 and Python 3.11, the LSTM
reached a perplexity of 96 in training and 103 in validation in six epochs (40 seconds of one core)
with the default of 0.25, which clipped 12 % of the steps. Without clipping the perplexity was above
50,000 after two epochs. ``--clip zscore`` was no better: at so high a learning rate the first steps
decide, and a rule that compares a norm with earlier norms has no threshold yet.
(On busy cores ``OMP_NUM_THREADS=1`` is much faster.)
"""

import argparse
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pydoc_data.topics import topics

import torch
from rules import CHOICES, clipping, positive
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter

from gradclip import GradientClipper, TensorBoardSink

RATES = {"RNN_TANH": 4.0, "RNN_RELU": 2.0, "LSTM": 20.0, "GRU": 20.0, "Transformer": 5.0}
State = Tensor | tuple[Tensor, ...] | None


class LanguageModel(nn.Module):
    """The first and the last layer, with small weights; a subclass adds the layers between."""

    def __init__(self, args: argparse.Namespace, words: int, width: int) -> None:
        super().__init__()
        self.drop = nn.Dropout(args.dropout)
        self.embed = nn.Embedding(words, args.emsize)
        self.head = nn.Linear(width, words)
        if args.tied:
            self.head.weight = self.embed.weight
        for weight in (self.embed.weight, self.head.weight):
            nn.init.uniform_(weight, -0.1, 0.1)
        nn.init.zeros_(self.head.bias)


class Recurrent(LanguageModel):
    """Embedding, recurrent layers, linear layer."""

    def __init__(self, args: argparse.Namespace, words: int) -> None:
        super().__init__(args, words, args.nhid)
        cell, *kind = args.model.lower().split("_")
        layers = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}[cell]
        options = {"nonlinearity": kind[0]} if kind else {}
        between = args.dropout if args.nlayers > 1 else 0.0
        self.layers = layers(args.emsize, args.nhid, args.nlayers, dropout=between, **options)

    def forward(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        """Return scores of the next words, of shape (time, batch, words), and the last state."""
        outputs, state = self.layers(self.drop(self.embed(inputs)), state)
        return self.head(self.drop(outputs)), state


class Transformer(LanguageModel):
    """Embedding of words and positions, encoder layers with a causal mask, linear layer."""

    def __init__(self, args: argparse.Namespace, words: int) -> None:
        super().__init__(args, words, args.emsize)
        layer = nn.TransformerEncoderLayer(args.emsize, args.nhead, args.nhid, args.dropout)
        self.positions = nn.Parameter(torch.empty(args.bptt, 1, args.emsize).uniform_(-0.1, 0.1))
        self.layers = nn.TransformerEncoder(layer, args.nlayers, enable_nested_tensor=False)

    def forward(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        """Return the scores of the next words, of shape (time, batch, words), and no state."""
        embedded = self.drop(self.embed(inputs) + self.positions[: len(inputs)])
        mask = nn.Transformer.generate_square_subsequent_mask(len(inputs), device=inputs.device)
        return self.head(self.layers(embedded, mask, is_causal=True)), state


def read_words() -> tuple[Tensor, Tensor, int]:
    """Return the words for training and for validation as numbers, and the vocabulary's size."""
    text = re.findall(r"\w+|[^\w\s]+", "\n".join(topics.values()))
    cut = len(text) * 9 // 10
    frequent = [word for word, count in Counter(text[:cut]).items() if count > 1]
    numbers = {word: number for number, word in enumerate(frequent, start=1)}  # 0: all others
    indices = torch.tensor([numbers.get(word, 0) for word in text])
    return indices[:cut], indices[cut:], len(frequent) + 1


def columns(words: Tensor, count: int) -> Tensor:
    """Return the text in columns that are read side by side, of shape (time, count)."""
    return words[: len(words) // count * count].view(count, -1).T.contiguous()


def pieces(text: Tensor, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Return pieces of the text, each with the words that follow its own."""
    return zip(text[:-1].split(length), text[1:].split(length), strict=True)


def loss_of(scores: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss of a word, in nats."""
    return F.cross_entropy(scores.flatten(0, 1), targets.flatten())


def detached(state: State) -> State:
    """Return the state detached from its graph."""
    if isinstance(state, tuple):
        return tuple(tensor.detach() for tensor in state)
    return state if state is None else state.detach()


def train(
    model: nn.Module,
    clipper: GradientClipper,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    interval: int,
) -> Tensor:
    """Take one step for each piece of the text; return the mean loss."""
    state, losses = None, []
    for inputs, targets in batches:
        scores, state = model(inputs, detached(state))
        loss = loss_of(scores, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()  # clips first
        losses.append(loss.detach())
        if clipper.steps % interval == 0:
            perplexity = torch.stack(losses[-interval:]).mean().exp()
            clipped = f"{clipper.clip_rate():.0%} of the norms clipped"
            print(f"step {clipper.steps:5}  perplexity {perplexity:8.2f}  {clipped}", flush=True)
    return torch.stack(losses).mean()


@torch.no_grad()
def evaluate(model: nn.Module, text: Tensor, length: int) -> Tensor:
    """Return the mean loss over a text."""
    model.eval()
    state, total = None, torch.zeros((), device=text.device)
    for inputs, targets in pieces(text, length):
        scores, state = model(inputs, state)
        total += loss_of(scores, targets) * len(inputs)
    model.train()
    return total / (len(text) - 1)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=RATES, default="LSTM")
    parser.add_argument(
        "--emsize", type=positive, default=128, help="size of the embedding of a word"
    )
    parser.add_argument("--nhid", type=positive, default=128, help="hidden units of a layer")
    parser.add_argument("--nlayers", type=positive, default=2)
    parser.add_argument("--nhead", type=positive, default=2, help="heads of the Transformer")
    rates = ", ".join(f"{rate:g} for {name}" for name, rate in RATES.items())
    parser.add_argument("--lr", type=float, help=f"default: {rates}")
    parser.add_argument("--clip", type=clipping, default="0.25", help=CHOICES)
    parser.add_argument("--epochs", type=positive, default=6)
    parser.add_argument("--steps", type=positive, help="stop after this number of steps")
    parser.add_argument("--batch-size", type=positive, default=20)
    parser.add_argument("--bptt", type=positive, default=35, help="words in a piece")
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument(
        "--tied", action="store_true", help="share one matrix for embedding and output"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-interval", type=positive, default=50)
    parser.add_argument("--log", metavar="DIR", help="folder for TensorBoard")
    args = parser.parse_args(arguments)
    if args.tied and args.model != "Transformer" and args.nhid != args.emsize:
        parser.error("--tied needs an --nhid that equals --emsize")
    if args.emsize % args.nhead and args.model == "Transformer":
        parser.error("--emsize has to be a multiple of --nhead")
    if args.lr is None:
        args.lr = RATES[args.model]
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and print the perplexity after every epoch."""
    args = parsed(arguments)
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for_training, for_validation, words = read_words()
    text = columns(for_training, args.batch_size).to(device)
    held_out = columns(for_validation, 10).to(device)

    kind = Transformer if args.model == "Transformer" else Recurrent
    model = kind(args, words).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
    annealing = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.25, patience=0)
    writer = SummaryWriter(args.log) if args.log else None
    log = TensorBoardSink(writer, per_parameter=5) if writer else None
    clipper = GradientClipper(optimizer, **args.clip, model=model, log=log)

    for epoch in range(1, args.epochs + 1):
        remaining = None if args.steps is None else args.steps - clipper.steps
        rate = optimizer.param_groups[0]["lr"]
        batches = islice(pieces(text, args.bptt), remaining)
        trained = train(model, clipper, optimizer, batches, args.log_interval)
        validated = evaluate(model, held_out, args.bptt)
        annealing.step(validated)
        perplexities = {"training": trained.exp().item(), "validation": validated.exp().item()}
        shown = ", ".join(f"{part} {value:.2f}" for part, value in perplexities.items())
        print(f"epoch {epoch}  lr {rate:g}  perplexity: {shown}", flush=True)
        if writer:
            for part, value in perplexities.items():
                writer.add_scalar(f"perplexity/{part}", value, clipper.steps)
        if clipper.steps == args.steps:
            break

    print(
        f"{clipper.clip_rate():.0%} of the norms in {clipper.steps} steps were clipped: {clipper}"
    )
    clipper.close()
    if writer:
        writer.close()
        print(f"Curves: tensorboard --logdir {args.log}")


if __name__ == "__main__":
    main()
