//! A SentencePiece model file: its protocol buffers, as far as they are needed, and what must hold of them.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use prost::Message;

use super::charsmap;
use crate::shards::scan::LFS_POINTER;
use crate::text::TextError;

/// `sentencepiece.ModelProto`.
#[derive(Clone, PartialEq, Message)]
struct ModelProto {
    #[prost(message, repeated, tag = "1")]
    pieces: Vec<SentencePiece>,
    #[prost(message, optional, tag = "2")]
    trainer_spec: Option<TrainerSpec>,
    #[prost(message, optional, tag = "3")]
    normalizer_spec: Option<NormalizerSpec>,
}

#[derive(Clone, PartialEq, Message)]
struct SentencePiece {
    #[prost(string, optional, tag = "1")]
    piece: Option<String>,
    #[prost(float, optional, tag = "2")]
    score: Option<f32>,
    /// [`UNKNOWN`] and its like; absent for a usual piece.
    #[prost(int32, optional, tag = "3")]
    kind: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
struct TrainerSpec {
    /// [`UNIGRAM`] where it is absent.
    #[prost(int32, optional, tag = "3")]
    model_type: Option<i32>,
    #[prost(bool, optional, tag = "35")]
    byte_fallback: Option<bool>,
    #[prost(int32, optional, tag = "40")]
    unk_id: Option<i32>,
    #[prost(string, optional, tag = "45")]
    unk_piece: Option<String>,
}

#[derive(Clone, PartialEq, Message)]
struct NormalizerSpec {
    #[prost(bytes = "vec", optional, tag = "2")]
    precompiled_charsmap: Option<Vec<u8>>,
    #[prost(bool, optional, tag = "3")]
    add_dummy_prefix: Option<bool>,
    #[prost(bool, optional, tag = "4")]
    remove_extra_whitespaces: Option<bool>,
}

const UNIGRAM: i32 = 1;
const BPE: i32 = 2;

const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;

/// How texts are cut into pieces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Algorithm {
    /// The most probable pieces.
    Unigram,
    /// Pairs merged in the order of their scores.
    Bpe,
}

/// A piece of the vocabulary; its id is its place.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Piece {
    pub(super) text: String,
    pub(super) score: f64,
    /// A symbol that never comes out of a text, as `<s>`.
    pub(super) control: bool,
    /// A symbol that is always one piece.
    pub(super) user_defined: bool,
}

/// What a model file says, checked.
#[derive(Debug)]
pub(super) struct Model {
    pub(super) path: PathBuf,
    pub(super) algorithm: Algorithm,
    pub(super) pieces: Vec<Piece>,
    /// The id of the piece that stands for what the vocabulary lacks.
    pub(super) unknown: usize,
    /// What the trainer was told of that piece: id and text.
    pub(super) told_unknown: (i64, String),
    /// Whether bytes stand for characters that the vocabulary lacks.
    pub(super) byte_fallback: bool,
    /// The normaliser's table; empty where texts stay as they are.
    pub(super) charsmap: Vec<u8>,
    /// Whether a space goes in front of a text.
    pub(super) add_dummy_prefix: bool,
    /// Whether of several spaces one is left, and none at the ends.
    pub(super) remove_extra_whitespaces: bool,
}

impl Model {
    /// Reads the file.
    ///
    /// # Errors
    /// A file that cannot be read, is no SentencePiece model or is damaged; models of words and of characters.
    pub(super) fn read(path: &Path) -> Result<Model, TextError> {
        let damaged = |reason: String| TextError::Load { path: path.to_owned(), reason };
        let bytes = fs::read(path).map_err(|error| damaged(error.to_string()))?;
        if bytes.starts_with(LFS_POINTER) {
            return Err(damaged("it is a Git LFS pointer, not the file; run `git lfs pull`".to_owned()));
        }
        let proto = ModelProto::decode(bytes.as_slice()).map_err(|error| {
            damaged(format!("expected a SentencePiece model, got a damaged or other file ({error}); fetch it again"))
        })?;
        Model::check(path, proto).map_err(damaged)
    }

    fn check(path: &Path, proto: ModelProto) -> Result<Model, String> {
        let (Some(trainer), Some(normalizer), false) =
            (proto.trainer_spec, proto.normalizer_spec, proto.pieces.is_empty())
        else {
            return Err("expected a SentencePiece model with pieces, trainer_spec and normalizer_spec, got one without them all; fetch it again".to_owned());
        };
        let algorithm = match trainer.model_type.unwrap_or(UNIGRAM) {
            UNIGRAM => Algorithm::Unigram,
            BPE => Algorithm::Bpe,
            other => {
                let got = match other {
                    3 => "WORD",
                    4 => "CHAR",
                    _ => "another",
                };
                return Err(format!("trainer_spec.model_type: expected UNIGRAM or BPE, got {got}; take another model"));
            }
        };
        let unknown: Vec<usize> =
            (0..proto.pieces.len()).filter(|&id| proto.pieces[id].kind == Some(UNKNOWN)).collect();
        let [unknown] = unknown[..] else {
            return Err(format!("expected one unknown piece, got {}; fetch the file again", unknown.len()));
        };
        let mut pieces = Vec::with_capacity(proto.pieces.len());
        for (id, SentencePiece { piece, score, kind }) in proto.pieces.into_iter().enumerate() {
            let (text, score) = (piece.unwrap_or_default(), f64::from(score.unwrap_or_default()));
            if text.is_empty() || !score.is_finite() {
                return Err(format!("piece {id}: expected a text with a finite score, got {text:?} with {score}"));
            }
            let (control, user_defined) = (kind == Some(CONTROL), kind == Some(USER_DEFINED));
            pieces.push(Piece { text, score, control, user_defined });
        }
        let mut seen = HashSet::new();
        if let Some(twice) = pieces.iter().find(|piece| !seen.insert(piece.text.as_str())) {
            return Err(format!("expected each piece once, got {:?} twice; fetch the file again", twice.text));
        }
        let charsmap = normalizer.precompiled_charsmap.unwrap_or_default();
        charsmap::check(&charsmap).map_err(|reason| format!("normalizer_spec.precompiled_charsmap: {reason}"))?;
        Ok(Model {
            path: path.to_owned(),
            algorithm,
            pieces,
            unknown,
            told_unknown: (trainer.unk_id.unwrap_or_default().into(), trainer.unk_piece.unwrap_or("<unk>".to_owned())),
            byte_fallback: trainer.byte_fallback.unwrap_or(false),
            charsmap,
            add_dummy_prefix: normalizer.add_dummy_prefix.unwrap_or(true),
            remove_extra_whitespaces: normalizer.remove_extra_whitespaces.unwrap_or(true),
        })
    }
}
