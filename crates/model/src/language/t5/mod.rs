//! T5, T5 1.1 and FlanT5: an encoder that reads the queries with their prompt, a decoder that writes.
//!
//! What overflows in half precision is kept as `transformers` 4.57 keeps it: norms and softmax in f32; under fp16 `wo`, and so the residual
//! stream behind the first feed-forward layer, in f32, with infinities clamped before it. bf16 has the range of f32 and needs none of this.

pub mod config;
mod layers;
mod position;
mod stack;

use blip2_torchx::params::{Init, Scope};
use tch::{Kind, Tensor};

use crate::dropout::Dropout;
pub use config::T5Config;
pub use stack::DecoderState;
use stack::{Decoder, Encoder};

/// The model.
#[derive(Debug)]
pub struct T5 {
    shared: Tensor,
    encoder: Encoder,
    decoder: Decoder,
    /// T5 1.1 and FlanT5 have a head of their own, T5's is the word embedding.
    head: Option<Tensor>,
    /// Multiplies what the head gets: T5's.
    output_scale: Option<f64>,
    decoder_start_token_id: i64,
}

impl T5 {
    /// Declares the model: `shared`, `encoder.*`, `decoder.*`, and `lm_head.weight` unless tied.
    pub fn new(scope: &Scope, c: &T5Config) -> T5 {
        let table = [c.vocab_size, c.d_model];
        let embedding = |name: &str| scope.pp(name).param("weight", &table, Init::Normal(0.02));
        T5 {
            shared: embedding("shared"),
            encoder: Encoder::new(&scope.pp("encoder"), c),
            decoder: Decoder::new(&scope.pp("decoder"), c),
            head: (!c.tie_word_embeddings).then(|| embedding("lm_head")),
            output_scale: c.scales_output().then(|| (c.d_model as f64).powf(-0.5)),
            decoder_start_token_id: c.decoder_start_token_id,
        }
    }

    /// The dtype it computes in.
    pub fn kind(&self) -> Kind {
        self.shared.kind()
    }

    /// `ids i64 [.., T] -> [.., T, d_model]`, for the encoder and the decoder alike.
    pub fn embed(&self, ids: &Tensor) -> Tensor {
        Tensor::embedding(&self.shared, ids, -1, false, false)
    }

    /// `hidden [.., d_model] -> logits [.., vocabulary]`.
    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        let (head, none): (_, Option<&Tensor>) = (self.head.as_ref().unwrap_or(&self.shared), None);
        match self.output_scale {
            None => hidden.linear(head, none),
            Some(scale) => (hidden * scale).linear(head, none),
        }
    }

    /// The decoder's hidden states that predict `written`, given what is read.
    ///
    /// # Shapes
    /// `read [B, N, d_model]` embedded, `mask bool [B, N]`, true at tokens wherever the padding is; `written i64 [B, T]` right-padded;
    /// `-> [B, T, d_model]`, row `t` of which predicts token `t`.
    pub fn forward(&self, read: &Tensor, mask: &Tensor, written: &Tensor, dropout: &Dropout) -> Tensor {
        let read = self.encode(read, mask, dropout);
        let (batch, tokens) = written.size2().expect("rank 2: [B, T]");
        let start = Tensor::full([batch, 1], self.decoder_start_token_id, (Kind::Int64, written.device()));
        let shifted = Tensor::cat(&[start, written.shallow_clone()], 1).narrow(1, 0, tokens);
        self.decoder.forward(&self.embed(&shifted), &mut self.decoder.begin(&read, mask), dropout)
    }

    /// The encoder's last hidden states: `read [B, N, d_model]`, `mask bool [B, N] -> [B, N, d_model]`.
    pub fn encode(&self, read: &Tensor, mask: &Tensor, dropout: &Dropout) -> Tensor {
        self.encoder.forward(&read.to_kind(self.kind()), mask, dropout)
    }

    /// Reads, and predicts the first token of each text: logits `[B, vocabulary]`.
    ///
    /// # Shapes
    /// As [`T5::forward`].
    pub fn begin(&self, read: &Tensor, mask: &Tensor) -> (DecoderState, Tensor) {
        let mut state = self.decoder.begin(&self.encode(read, mask, &Dropout::off()), mask);
        let start = Tensor::full([read.size()[0]], self.decoder_start_token_id, (Kind::Int64, read.device()));
        let logits = self.step(&start, &mut state);
        (state, logits)
    }

    /// The token behind one more token of each text: `tokens i64 [B] -> logits [B, vocabulary]`.
    pub fn step(&self, tokens: &Tensor, state: &mut DecoderState) -> Tensor {
        let hidden = self.decoder.forward(&self.embed(&tokens.unsqueeze(1)), state, &Dropout::off());
        self.logits(&hidden.select(1, 0))
    }
}
