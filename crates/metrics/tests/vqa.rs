//! VQA accuracy against LAVIS' (scripts/fixtures/vqa.py).

use std::fs;
use std::path::Path;

use blip2_metrics::{normalize_answer, vqa_accuracy};
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    /// A text, and the form in which it is compared.
    forms: Vec<(String, String)>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    answer: String,
    answers: Vec<String>,
    accuracy: f64,
}

fn golden() -> Golden {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/vqa/answers.json");
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn answers_have_the_form_that_lavis_compares() {
    let forms = golden().forms;
    assert!(forms.len() > 200);
    for (text, form) in forms {
        assert_eq!(normalize_answer(&text), form, "{text:?}");
    }
}

#[test]
fn accuracies_are_those_of_lavis() {
    let cases = golden().cases;
    assert!(cases.len() >= 200);
    for Case { answer, answers, accuracy } in cases {
        let ours = vqa_accuracy(&answer, &answers);
        assert!((ours - accuracy).abs() < 1e-9, "{answer:?} among {answers:?}: {ours}, LAVIS {accuracy}");
    }
}
