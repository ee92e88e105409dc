"""Rows of the commonsense sets in the form of LLM-Adapters, and their columns, written by hand."""

ROWS = {
    "boolq": (
        "Please answer the following question with true or false, question: is water wet?\n\nAnswer format: true/false",
        "true",
        {"passage": "", "question": "is water wet", "label": 1},
    ),
    "piqa": (
        "Please choose the correct solution to the question: dresser\n\nSolution1: bobby pin \n\n"
        "Solution2: wood  pin \n\nAnswer format: solution1/solution2",
        "solution2",
        {"goal": "dresser", "sol1": "bobby pin ", "sol2": "wood  pin ", "label": 1},
    ),
    "social_i_qa": (
        "Please choose the correct answer to the question: Jan met Lee. She said: hi. What next?\n\n"
        "Answer1: go Answer2: stay Answer3: ask Lee\n\nAnswer format: answer1/answer2/answer3",
        "answer3",
        {
            "context": "Jan met Lee. She said: hi.",
            "question": "What next?",
            "answerA": "go",
            "answerB": "stay",
            "answerC": "ask Lee",
            "label": "3",
        },
    ),
    "hellaswag": (
        "Please choose the correct ending to complete the given sentence: Ice fishing: A man sits. He waits. "
        "the old man\n\nEnding1: eats. Ending2: looks up. Sings. Ending3: is. Ending4: ice\n\n"
        "Answer format: ending1/ending2/ending3/ending4",
        "ending2",
        {
            "activity_label": "Ice fishing",
            "ctx_a": "A man sits. He waits.",
            "ctx_b": "the old man",
            "endings": ["eats.", "looks up. Sings.", "is.", "ice"],
            "label": "1",
        },
    ),
    "winogrande": (
        "Please choose the correct answer to fill in the blank to complete the given sentence: Ann saw Bo, so _ "
        "ran.\n\nOption1: Ann Option2: Bo Answer format: option1/option2",
        "option1",
        {"sentence": "Ann saw Bo, so _ ran.", "option1": "Ann", "option2": "Bo", "answer": "1"},
    ),
    "ARC-Easy": (
        "Please choose the correct answer to the question: Which?\nRead.\n\nAnswer1: a Answer2: b c Answer3: d\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer2",
        {
            "question": "Which?\nRead.",
            "choices": {"text": ["a", "b c", "d"], "label": ["A", "B", "C"]},
            "answerKey": "B",
        },
    ),
    "openbookqa": (
        "Please choose the correct answer to the question: Fog is\n\nAnswer1: wet Answer2: dry\n\n"
        "Answer format: answer1/answer2",
        "answer1",
        {"question_stem": "Fog is", "choices": {"text": ["wet", "dry"], "label": ["A", "B"]}, "answerKey": "A"},
    ),
}
"""Set -> instruction, answer, and the columns of the original set."""
