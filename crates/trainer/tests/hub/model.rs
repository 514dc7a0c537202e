//! A model as a hub serves it: its list of files, and the files.

#![allow(dead_code)] // several programs of tests use their part of it

use std::collections::BTreeMap;

use serde_json::json;
use sha2::{Digest, Sha256};

use crate::server::{Answer, Request};

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Files of `hf://org/name` at one commit.
#[derive(Clone)]
pub struct Model {
    pub commit: &'static str,
    pub files: BTreeMap<String, Vec<u8>>,
}

impl Model {
    pub fn new(files: &[(&str, &[u8])]) -> Model {
        let files = files.iter().map(|(name, content)| (name.to_string(), content.to_vec()));
        Model { commit: COMMIT, files: files.collect() }
    }

    /// Small files and 200 kB of weights.
    pub fn usual() -> Model {
        let weights: Vec<u8> = (0..200_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        Model::new(&[
            ("config.json", b"{\"model_type\": \"opt\"}"),
            ("tokenizer.json", b"{}"),
            ("generation_config.json", b"{}"),
            ("model.safetensors", &weights),
            ("pytorch_model.bin", b"the same once more"),
            ("README.md", b"# A model"),
            ("onnx/model.onnx", b"of no use here"),
        ])
    }

    pub fn weights(&self) -> &[u8] {
        &self.files["model.safetensors"]
    }

    pub fn digest(&self, name: &str) -> String {
        format!("{:x}", Sha256::digest(&self.files[name]))
    }

    /// Weights are large files, with their SHA-256; the others have a digest that is not of their content alone.
    fn listing(&self) -> String {
        let sibling = |(name, content): (&String, &Vec<u8>)| {
            let blob = format!("{:x}", Sha256::digest(name))[..40].to_string();
            let mut entry = json!({"rfilename": name, "size": content.len(), "blobId": blob});
            if name.ends_with(".safetensors") || name.ends_with(".bin") {
                entry["lfs"] = json!({"sha256": self.digest(name), "size": content.len(), "pointerSize": 130});
            }
            entry
        };
        json!({"sha": self.commit, "siblings": self.files.iter().map(sibling).collect::<Vec<_>>()}).to_string()
    }

    pub fn answer(&self, request: &Request) -> Answer {
        let revisions =
            ["main", self.commit].map(|revision| format!("/api/models/org/name/revision/{revision}?blobs=true"));
        if revisions.contains(&request.path) {
            return Answer::new(200, self.listing());
        }
        let name = request.path.strip_prefix(&format!("/org/name/resolve/{}/", self.commit));
        match name.and_then(|name| self.files.get(name)) {
            Some(content) => Answer::file(request, content),
            None => Answer::new(404, "Not Found"),
        }
    }
}
