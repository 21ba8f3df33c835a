"""Rows under jailbreak attacks, as a folder or file of rows with their images: `augment --in rows.jsonl --out DIR`.

rows.jsonl, heldout.jsonl, images/ and the contact sheet appear together or not at all. Each row is followed by its
attacked versions, by family, kind and name of the attack. An image that no attack touched is copied byte for byte.
"""




