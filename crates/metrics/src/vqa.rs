//! VQA accuracy (Antol et al., 2015): several people have answered a question, and an answer is as good as the number
//! of people who gave it, three being enough.
//!
//! Both the answer and the people's are brought to one form first, as the evaluation of <https://visualqa.org/evaluation.html> says: no articles and
//! punctuation, lower case, digits for number words, apostrophes in contractions. Its published code leaves most of this out for the people's answers,
//! so where those are not in that form already, an answer can be right here and wrong there.

/// Answers of fewer people are no vote: with three, none could be left out and three remain.
const FEWEST_FOR_A_VOTE: usize = 4;
/// So many people who agree make an answer right.
const ENOUGH_AGREE: f64 = 3.0;

/// Marks that separate words or belong to none; apostrophes and colons (`2:50`) stay.
const MARKS: [char; 21] =
    [';', '/', '[', ']', '"', '{', '}', '(', ')', '=', '+', '\\', '_', '-', '>', '<', '@', '`', ',', '?', '!'];

const ARTICLES: [&str; 3] = ["a", "an", "the"];

const NUMBERS: [(&str, &str); 12] = [
    ("none", "0"),
    ("zero", "0"),
    ("one", "1"),
    ("two", "2"),
    ("three", "3"),
    ("four", "4"),
    ("five", "5"),
    ("six", "6"),
    ("seven", "7"),
    ("eight", "8"),
    ("nine", "9"),
    ("ten", "10"),
];

/// Contractions that are recognised when one of their apostrophes is missing; those that are a word without it (`she'll`, `we're`) are not.
const CONTRACTIONS: &str = "
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll how's
    isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
    something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
    wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've";

/// The share of an answer that is right, 0 to 1.
///
/// Of `n >= 4` people's answers each is left out in turn, and the answer gets the mean of `min(1, others that are the same / 3)`. With fewer
/// people (GQA has one) it is right, 1, if any of them says the same. Without any it is wrong.
pub fn vqa_accuracy<T: AsRef<str>>(answer: &str, truths: &[T]) -> f64 {
    let answer = normalize_answer(answer);
    let people = truths.len();
    let same = truths.iter().filter(|truth| normalize_answer(truth.as_ref()) == answer).count();
    if people < FEWEST_FOR_A_VOTE {
        return if same > 0 { 1.0 } else { 0.0 };
    }
    let score = |others: usize| (others as f64 / ENOUGH_AGREE).min(1.0);
    let without_one_of_them = same as f64 * score(same.saturating_sub(1));
    (without_one_of_them + (people - same) as f64 * score(same)) / people as f64
}

/// The form in which answers are compared.
///
/// It has the oddities of the evaluation's published code: a mark becomes a space, but nothing where it stands beside a space anywhere in the text
/// or a comma separates digits anywhere; a full stop stays in front of a digit only; `somebody'd` loses its apostrophe.
pub fn normalize_answer(answer: &str) -> String {
    let text = answer.replace(['\n', '\t'], " ");
    let text = without_full_stops(&without_marks(text.trim_matches(is_space)));
    let lower = text.to_lowercase();
    let words = lower.split(is_space).filter(|word| !word.is_empty());
    let words = words.map(|word| digits(word).unwrap_or(word)).filter(|word| !ARTICLES.contains(word));
    words.map(contraction).collect::<Vec<_>>().join(" ")
}

fn without_marks(text: &str) -> String {
    let characters: Vec<char> = text.chars().collect();
    let between_digits = |three: &[char]| is_digit(three[0]) && three[1] == ',' && is_digit(three[2]);
    let number_with_comma = characters.windows(3).any(between_digits);
    let vanishes = MARKS.map(|mark| {
        let beside_space = |two: &[char]| two == [mark, ' '] || two == [' ', mark];
        number_with_comma || characters.windows(2).any(beside_space)
    });
    let replaced = |&character: &char| match MARKS.iter().position(|&mark| mark == character) {
        None => Some(character),
        Some(mark) if vanishes[mark] => None,
        Some(_) => Some(' '),
    };
    characters.iter().filter_map(replaced).collect()
}

fn without_full_stops(text: &str) -> String {
    let mut rest = text.chars().peekable();
    let mut kept = String::with_capacity(text.len());
    while let Some(character) = rest.next() {
        if character != '.' || rest.peek().copied().is_some_and(is_digit) {
            kept.push(character);
        }
    }
    kept
}

fn digits(word: &str) -> Option<&'static str> {
    NUMBERS.iter().find(|(name, _)| *name == word).map(|(_, digits)| *digits)
}

/// The word with the apostrophe that it lacks.
fn contraction(word: &str) -> &str {
    if word == "somebody'd" {
        return "somebodyd";
    }
    let lacks_one = |whole: &str| {
        let mut apostrophes = whole.match_indices('\'').map(|(at, _)| at);
        let is_without = |at: usize| word.starts_with(&whole[..at]) && word.ends_with(&whole[at + 1..]);
        word.len() + 1 == whole.len() && apostrophes.any(is_without)
    };
    CONTRACTIONS.split_whitespace().find(|whole| lacks_one(whole)).unwrap_or(word)
}

/// Python's idea of white space, which holds four separators more than Unicode's.
fn is_space(character: char) -> bool {
    character.is_whitespace() || matches!(character, '\u{1c}'..='\u{1f}')
}

fn is_digit(character: char) -> bool {
    character.is_ascii_digit()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn answers_are_brought_to_one_form() {
        for (answer, form) in [
            ("A dog.", "dog"),
            (" The\tUnited\nStates ", "united states"),
            ("TWO", "2"),
            ("none", "0"),
            ("twenty one", "twenty 1"),
            ("black/white", "black white"),
            ("black, white and a red", "black white and red"),
            ("t-shirt", "t shirt"),
            ("100,978", "100978"),
            ("1,000 t-shirts", "1000 tshirts"),
            ("2:50 p.m.", "2:50 pm"),
            ("3.5", "3.5"),
            ("3.", "3"),
            ("dont", "don't"),
            ("couldnt've", "couldn't've"),
            ("couldn'tve", "couldn't've"),
            ("couldntve", "couldntve"),
            ("girl's", "girl's"),
            ("its", "its"),
            ("somebody'd", "somebodyd"),
            ("a an the", ""),
            ("?!", ""),
            ("", ""),
        ] {
            assert_eq!(normalize_answer(answer), form, "{answer:?}");
        }
    }

    #[test]
    fn three_of_ten_people_make_an_answer_nearly_right_and_four_right() {
        let accuracy = |same: usize| {
            let truths: Vec<&str> = (0..10).map(|person| if person < same { "yes" } else { "no" }).collect();
            vqa_accuracy("Yes.", &truths)
        };
        for (same, expected) in [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)] {
            assert!((accuracy(same) - expected).abs() < 1e-12, "{same}: {}", accuracy(same));
        }
    }

    #[test]
    fn with_fewer_than_four_people_any_of_them_is_enough() {
        assert_eq!(vqa_accuracy("two", &["3", "2", "no"]), 1.0);
        assert_eq!(vqa_accuracy("4", &["3", "2", "no"]), 0.0);
        assert_eq!(vqa_accuracy("A bus", &["the bus"]), 1.0);
        assert_eq!(vqa_accuracy("", &[""; 0]), 0.0);
        assert!((vqa_accuracy("2", &["3", "2", "no", "1"]) - 0.25).abs() < 1e-12);
    }

    proptest! {
        /// What the evaluation says: leave each person out.
        #[test]
        fn equals_leaving_each_one_out(answer in 0..3u8, truths in proptest::collection::vec(0..3u8, 4..12)) {
            let same = |left_out: usize| {
                truths.iter().enumerate().filter(|&(person, truth)| person != left_out && *truth == answer).count()
            };
            let scores = (0..truths.len()).map(|person| f64::min(1.0, same(person) as f64 / 3.0));
            let expected = scores.sum::<f64>() / truths.len() as f64;
            let truths: Vec<String> = truths.iter().map(u8::to_string).collect();
            prop_assert!((vqa_accuracy(&answer.to_string(), &truths) - expected).abs() < 1e-12);
        }

        #[test]
        fn any_text_has_a_form(text: String) {
            let form = normalize_answer(&text);
            prop_assert_eq!(form.trim(), form.as_str());
        }
    }
}
