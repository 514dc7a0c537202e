//! A question about a picture, and the answers that people gave to it.

use serde_json::Value;

use crate::SampleError;
use crate::text::caption::JsonPath;

/// Where in the `.json` member they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuestionFields {
    /// A text.
    pub question: JsonPath,
    /// A text, a list of texts, or a list of objects with a text `answer`, as VQAv2's annotations have them.
    pub answers: JsonPath,
}

impl QuestionFields {
    pub(crate) fn question(&self, json: &Value) -> Result<String, SampleError> {
        let question = self.question.find(json).and_then(Value::as_str).filter(|question| !question.trim().is_empty());
        question.map(str::to_owned).ok_or_else(|| SampleError::Question(self.question.as_str().to_owned()))
    }

    /// At least one that says something.
    pub(crate) fn answers(&self, json: &Value) -> Result<Vec<String>, SampleError> {
        let answers = match self.answers.find(json) {
            Some(Value::Array(list)) => list.iter().map(answer).collect(),
            Some(one) => one.as_str().map(|text| vec![text.to_owned()]),
            None => None,
        };
        let answers = answers.filter(|answers: &Vec<String>| answers.iter().any(|answer| !answer.trim().is_empty()));
        answers.ok_or_else(|| SampleError::Answers(self.answers.as_str().to_owned()))
    }
}

fn answer(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value.get("answer")?.as_str()).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn fields() -> QuestionFields {
        QuestionFields { question: JsonPath::new("vqa.q"), answers: JsonPath::new("answers") }
    }

    #[test]
    fn answers_are_a_text_or_a_list_of_texts_or_of_annotations() {
        let answers =
            |answers: Value| fields().answers(&json!({"answers": answers})).map_err(|error| error.to_string());
        assert_eq!(answers(json!("a bus")).unwrap(), ["a bus"]);
        assert_eq!(answers(json!(["yes", "no", ""])).unwrap(), ["yes", "no", ""]);
        let annotations = json!([{"answer": "net", "answer_confidence": "maybe", "answer_id": 1}, {"answer": "nets"}]);
        assert_eq!(answers(annotations).unwrap(), ["net", "nets"]);
        let missing =
            "answers: the JSON has no text, list of texts or list of objects with a text \"answer\" in \"answers\"";
        for none in
            [json!(null), json!([]), json!(["", " "]), json!(""), json!(3), json!(["yes", 3]), json!([{"answer": 3}])]
        {
            assert_eq!(answers(none.clone()).unwrap_err(), missing, "{none}");
        }
        assert_eq!(fields().answers(&json!({})).unwrap_err().to_string(), missing);
    }

    #[test]
    fn a_question_is_a_text_with_something_in_it() {
        assert_eq!(fields().question(&json!({"vqa": {"q": "what?"}})).unwrap(), "what?");
        for none in [json!({}), json!({"vqa": {"q": " "}}), json!({"vqa": {"q": ["what?"]}}), json!(["vqa"])] {
            let error = fields().question(&none).unwrap_err().to_string();
            assert_eq!(error, "question: the JSON has no text field \"vqa.q\"", "{none}");
        }
    }
}
