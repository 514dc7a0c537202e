//! Precision as the config names it, in libtorch's terms.

use tch::Kind;

use crate::config::Precision;

impl Precision {
    /// The storage dtype of frozen weights.
    pub fn kind(self) -> Kind {
        match self {
            Precision::Fp32 => Kind::Float,
            Precision::Bf16 => Kind::BFloat16,
            Precision::Fp16 => Kind::Half,
        }
    }

    /// What autocast casts to; `None` for fp32.
    pub fn autocast(self) -> Option<Kind> {
        (self != Precision::Fp32).then(|| self.kind())
    }
}
