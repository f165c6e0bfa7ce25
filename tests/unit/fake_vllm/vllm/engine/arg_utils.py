import dataclasses


@dataclasses.dataclass
class EngineArgs:
    model: str
    max_model_len: int
    enforce_eager: bool
    mode: str

    @staticmethod
    def add_cli_args(parser):
        parser.add_argument("--model")
        parser.add_argument("--max-model-len", type=int)
        parser.add_argument("--enforce-eager", action="store_true")
        parser.add_argument("--mode", default="well")
        for ignored in ("--dtype", "--max-num-seqs", "--max-num-batched-tokens", "--load-format"):
            parser.add_argument(ignored)
        for ignored in ("--no-enable-prefix-caching", "--skip-tokenizer-init"):
            parser.add_argument(ignored, action="store_true")
        return parser

    @classmethod
    def from_cli_args(cls, args):
        return cls(**{field.name: getattr(args, field.name) for field in dataclasses.fields(cls)})
