"""A row of the catalog without a claim."""

import dataclasses

from conformance.checks import claims_are_complete
from fallline.core.registry import catalog

CAUGHT_BY = claims_are_complete
CASE = dataclasses.replace(catalog()["diffgrad"], id="claimless")
